"""mmfast.ops"""
