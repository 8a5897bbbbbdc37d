"""Every test here runs on several devices."""

from devices import device, pytest_generate_tests

__all__ = ["device", "pytest_generate_tests"]
