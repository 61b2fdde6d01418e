"""The literate-programming tool: chapters in, a package and notebooks out."""
