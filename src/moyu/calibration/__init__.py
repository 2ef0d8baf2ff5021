"""From text to a plan: layers in order, budgets, compensation, routers in the loop."""
