"""mmfast.models"""
