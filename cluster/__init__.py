"""Everything that decides and faces users: routers, placement, fleet, gateway, command line."""
