"""The outside as it is: each driver keeps one port and translates every foreign error."""
