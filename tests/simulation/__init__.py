"""The broker's real code in a simulated world: clock, network, threads, disk, clients, actors. A seed is a history."""
