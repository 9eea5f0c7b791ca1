"""What fits Filao into frameworks; each is imported only by those who have it installed."""
