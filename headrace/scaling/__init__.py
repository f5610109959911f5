"""How many workers each tier needs: costs, traces, the policy, its simulator, and what carries a decision out."""
