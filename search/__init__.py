"""What to choose: spaces, costs, budgets and the search over allocations. Knows nothing of torch, ray, sql or http."""
