"""A pool of GPUs in simulated time, driven by the policies and the planner of the live instance."""
