"""What the kernels may reach on a GPU by a static model, and the one command that measures it there."""
