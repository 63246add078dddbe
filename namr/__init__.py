"""namr: neighbourhood-adaptive image embeddings, and the search index made of them."""
