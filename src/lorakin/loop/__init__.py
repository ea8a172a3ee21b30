"""At optimizer steps: parameter groups, step hooks, FSDP2, DeepSpeed ZeRO and float16."""
