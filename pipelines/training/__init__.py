"""What train.py is made of: checks, what a training needs, one update, evaluation, what is said and written."""
