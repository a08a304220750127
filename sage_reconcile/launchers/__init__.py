"""Programs that sage starts as engines. They stand alone: none of them imports the rest of sage."""
