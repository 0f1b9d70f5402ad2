"""Digits in six views: fusion of many and of two encoders, with all views and with some missing."""
