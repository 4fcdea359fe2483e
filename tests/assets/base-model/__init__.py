"""The demo's base model, which installs as data of Lorry's: its files lie beside this one."""
