"""What follows a loop's optimizer: parameter groups, step hooks, FSDP2 and DeepSpeed ZeRO."""
