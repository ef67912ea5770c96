"""Globally whitened advantages: REINFORCE++ and its form with a group baseline."""
