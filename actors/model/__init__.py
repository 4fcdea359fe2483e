"""The frozen base, and what is attached to it for many adapters. Knows no run, request or folder of an adapter."""
