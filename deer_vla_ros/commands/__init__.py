"""The commands that a person runs, one file each. They import lazily, and nothing imports them."""
