"""Where stores are and how they are read and written: everything below the commands that knows a file."""
