"""What a penalty did and what a chain does, in words and tables; pictures are in `funcreg.plot`."""
