"""What every subpackage uses: command line, optional packages, folders and files, threads."""
