"""One room an ecosystem: what its users need to train a child network, in its own words."""
