"""How good maps are: the methods of the verb "compare", one number for each image."""
