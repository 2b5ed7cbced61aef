"""What is in files and folders of weights: formats, layouts of folders, adapters."""
