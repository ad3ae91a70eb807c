"""What lies where: copies of objects, who is served by which, promotion, eviction, and the decisions behind them."""
