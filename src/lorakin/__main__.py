"""`python -m lorakin`, and `accelerate launch -m lorakin` or `torchrun -m lorakin` for several processes."""

from lorakin.cli import main

if __name__ == "__main__":
    main()
