"""Models that search before they answer."""
