"""One command on a machine with a GPU: is it right there, how fast is it, and are the targets met?"""
