"""One generation under a plan."""
