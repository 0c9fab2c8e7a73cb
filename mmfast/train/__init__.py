"""mmfast.train"""
