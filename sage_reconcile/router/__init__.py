"""SERVES. The data path: it is handed routes, it never looks for itself and never starts anything."""
