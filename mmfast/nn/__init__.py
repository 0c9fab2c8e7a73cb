"""mmfast.nn"""
