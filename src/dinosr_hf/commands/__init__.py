"""The subcommands of `dinosr`, each a module with a `main(argv)`; the scripts of examples/ call the same functions."""
