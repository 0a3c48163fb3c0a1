"""What a checkpoint is: which layers feed which, how its blocks are streamed, how its files are read and written."""
