"""Jobs of a cluster: what a stage makes, what became of each attempt, whether another is worth it."""
