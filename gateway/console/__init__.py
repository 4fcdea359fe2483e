"""Pages for people: what a tenant's runs do, and for administrators what the deployment does."""
