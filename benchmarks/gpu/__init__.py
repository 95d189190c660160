"""A static model of the kernels' speed on a GPU, and the command that measures them there."""
