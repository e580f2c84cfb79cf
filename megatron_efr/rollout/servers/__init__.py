"""SGLang servers as processes: started, watched, started again, ended."""
