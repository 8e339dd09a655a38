"""`expertmesh plan`: how many GPUs a model needs and what they will give, by arithmetic alone."""
