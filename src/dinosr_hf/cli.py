"""The command `dinosr` as a module, for several processes: `accelerate launch -m dinosr_hf.cli pretrain`."""

from dinosr_cli import main

if __name__ == "__main__":
    main()
