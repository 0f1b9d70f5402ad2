"""What lies below the functions: the compiled modules, their dispatcher ops, autograd over them."""
