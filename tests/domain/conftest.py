from hypothesis import HealthCheck, settings

# A slow machine is no failure.
settings.register_profile("mvm", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("mvm")
