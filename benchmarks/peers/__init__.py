"""The article's network and recipe in other frameworks, each as its own documentation writes it. Each module is a program."""
