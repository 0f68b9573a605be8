"""A request's way from the socket to a node and back, one file a step:

listen, route, authenticate, decode, admit, schedule, relay, recover, settle.
"""
