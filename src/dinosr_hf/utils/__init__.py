"""What every room uses: command line, optional packages, folders and files, threads."""
