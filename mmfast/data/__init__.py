"""mmfast.data"""
