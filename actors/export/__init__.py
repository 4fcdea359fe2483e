"""What leaves a deployment: adapters as PEFT's folders, and merged into their base. Knows no run and no database."""
