"""lmleak tells what a gradient leaks before it is shared, and proves it by attacking it."""
