"""What the ops cost: resources ahead of time, times on a GPU."""
