"""What a process stands on: files and locks, checkpoints, ranks and devices, signals,
compilation."""
