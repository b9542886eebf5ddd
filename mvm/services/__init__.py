"""The one place for what mvm does: every caller (task, agent, sweep, test) comes here."""
